"""Reading, validating and writing checkpoint folders in the published format."""
