"""Several processes that train one model: how they meet, agree, and end together."""
