"""tokenferry: moves tokens to their experts and back in mixture-of-experts inference."""

from tokenferry.config import MoEConfig

__all__ = ["MoEConfig"]
