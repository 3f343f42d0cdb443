"""Checkpoints on disk: lazy reading, atomic writing, the model card and the lock file."""

from polymerge.checkpoint.card import Card, SkillRow, model_card
from polymerge.checkpoint.lock import lock_text, package_versions
from polymerge.checkpoint.reader import Checkpoint
from polymerge.checkpoint.writer import CheckpointWriter, check_free, require_space

__all__ = [
    "Card",
    "Checkpoint",
    "CheckpointWriter",
    "SkillRow",
    "check_free",
    "lock_text",
    "model_card",
    "package_versions",
    "require_space",
]
