"""Shapes that the environments, the shared memory and the agent must agree on."""

from __future__ import annotations

SAC_IMAGE_SIZE = 64
"""Height and width in pixels of the image that the SAC agent sees."""
