"""Between text and tokens: the tokenizer, and the way back from tokens to text as they come."""
