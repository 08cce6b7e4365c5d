"""System prompts: what stands before a caption when Lumina2's text encoder reads it."""

from __future__ import annotations

SYSTEM_PROMPTS = {
    "superior": "You are an assistant designed to generate superior images with the superior degree of image-text "
    "alignment based on textual prompts or user prompts.",
    "alignment": "You are an assistant designed to generate high-quality images with the highest degree of "
    "image-text alignment based on textual prompts.",
    "high-quality": "You are an assistant designed to generate high-quality images based on user prompts.",
    "neta-lumina": "You are an assistant designed to generate anime images based on textual prompts.",
    "none": "",
}
SEPARATOR = " <Prompt Start> "


def with_system_prompt(caption: str, system_prompt: str) -> str:
    """What the text encoder reads; without a system prompt the caption stands alone."""
    return f"{system_prompt}{SEPARATOR}{caption}" if system_prompt else caption
