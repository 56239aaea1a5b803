"""Where the stages read and write; dvc.yaml names the same paths (a test compares them)."""

import os
from pathlib import Path

RESOLVED = Path("resolved.yaml")
DOWNLOADS = Path("data/downloads")
REVIEWS = Path("data/reviews.parquet")
TOKENIZER = Path("data/tokenizer")
SEQUENCES = Path("data/sequences")
CHECKPOINTS = Path("checkpoints")
MODEL = Path("model")
REPORTS = Path("reports")
VOCABULARY_METRICS = REPORTS / "vocabulary.json"
LOSSES = REPORTS / "losses.csv"
STEPS = REPORTS / "steps.csv"
TRAIN_METRICS = REPORTS / "train.json"
EPOCH_TEXTS = REPORTS / "epoch_texts.jsonl"
RUN = REPORTS / "run.json"
EVALUATION = REPORTS / "evaluation.json"
EVALUATION_TEXT = REPORTS / "evaluation.txt"
EVALUATION_SAMPLES = REPORTS / "evaluation_samples.jsonl"
LOSS_BY_POSITION = REPORTS / "loss_by_position.csv"
LOSS_BY_BAND = REPORTS / "loss_by_band.csv"
FIGURES = REPORTS / "figures"
SAMPLES_TEXT = REPORTS / "samples.txt"
SAMPLES = REPORTS / "samples.jsonl"
REGISTERED = REPORTS / "registered.json"
GATE = REPORTS / "gate.json"
MODEL_CARD = REPORTS / "model_card.md"


def is_copy(folder: Path) -> bool:
    """Tells whether a folder is a copy of the project that DVC made for one experiment.

    It makes one for `dvc exp run --temp` and `--queue`, and removes it afterwards.
    """
    return "DVC_EXP_NAME" in os.environ and ".dvc/tmp/exps" in folder.resolve().as_posix()
