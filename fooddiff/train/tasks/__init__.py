"""What can be trained: each module makes a `Task`, and everything else of `train` knows tasks only."""
