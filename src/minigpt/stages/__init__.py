"""One file per stage of dvc.yaml; `python -m minigpt.stages NAME` runs one."""
