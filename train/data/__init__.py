"""The stream: from a store's shards to batches on the device, in an order determined only by numbers."""
