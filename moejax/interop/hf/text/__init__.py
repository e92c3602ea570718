"""The text side of a released model: its tokenizer, its chats, and how it wants to be sampled."""
