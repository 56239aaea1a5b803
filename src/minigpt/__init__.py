"""A DVC pipeline that trains, compares and ships the Keras miniature GPT."""
