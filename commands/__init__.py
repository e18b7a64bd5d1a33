"""What the commands at the root are made of; none of it travels with a checkpoint."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
