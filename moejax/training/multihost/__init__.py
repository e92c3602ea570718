"""Several processes that train one model: how they start, agree, stop and fail together."""
