"""Who runs next and who may hold which blocks: pure policy over the pool."""
