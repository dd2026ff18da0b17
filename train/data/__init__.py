"""The stream: from a store's shards to batches on the device, in an order that depends only on sizes and the seed."""
