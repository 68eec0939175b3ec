"""Where K and V live: arithmetic of planes, blocks and groups, the block pool, the prefix cache."""
