"""Multimodal LLMs in their true architecture and file format, with random weights: speed and memory are those of the
real ones, the words are not. The tokenizer is made up too, of as many entries as the real one's."""

from random_mllm.build import SHAPES, Shape, write

__all__ = ["SHAPES", "Shape", "write"]
