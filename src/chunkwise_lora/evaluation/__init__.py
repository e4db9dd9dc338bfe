"""Quality of an adapter under ChunkWise, compared with baselines: perplexity of text, and scores of answers."""
