"""The parts of `scripts/train_demo_model.py`: facts, text, rows, model, optimiser, evaluation and files."""
