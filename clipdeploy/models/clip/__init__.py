"""CLIP itself: both towers of a checkpoint, the tokenizer, and zero-shot classifiers.

A zero-shot classifier is an ordinary checkpoint file: the text tower has been run once, and its
embeddings are the weights of the head.  Later stages need neither the text tower nor the tokenizer.
"""
