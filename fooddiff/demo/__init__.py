"""A local web page to play with a model: orders -> drawing, step by step -> server -> page."""
