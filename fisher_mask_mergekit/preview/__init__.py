"""What a merge will do, and what is wrong with it, before it is done: from configurations, names, shapes and sidecars."""
