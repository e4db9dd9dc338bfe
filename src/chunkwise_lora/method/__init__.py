"""The method of the paper (arXiv 2601.21109) as computations on arrays, independent of models and engines."""
