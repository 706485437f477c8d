"""Where the small model lies that comes with the package. No jax: commands ask before it loads."""

from pathlib import Path

SHIPPED_MODEL = Path(__file__).resolve().parents[1] / "assets" / "nano"
