"""Keeps transformers from writing over our own progress bars."""

from __future__ import annotations


def quiet_transformers() -> None:
    """No bars and notes of transformers' in this process: ours suffice, and several ranks share a terminal."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
