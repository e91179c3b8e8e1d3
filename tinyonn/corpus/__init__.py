"""The corpus: from files of data to samples of tokens and labels, in a stored order."""
