"""A DVC pipeline that trains, compares and ships the Keras miniature GPT."""

import sys

if "keras" in sys.modules:  # so that keras.saving.load_model knows the class in an exported file
    import minigpt.model.network  # noqa: F401
