"""What a training tells the world: trackers, a page, a model card, the hub, webhooks. A tracker listens to a run."""
