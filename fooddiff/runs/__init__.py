"""What a run leaves behind, in files: whoever comes later reads it from here."""
