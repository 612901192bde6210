"""Files of any content: written whole or not at all, locked, hashed, read with care. Knows nothing of the project."""
