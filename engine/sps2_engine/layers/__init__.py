"""The layers of a decoder. Each owns its tensors and loads them; none knows which model it is part of."""
