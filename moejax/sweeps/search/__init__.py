"""Searches with Optuna: the study, its trials and its workers."""
