"""From a routing to rows grouped by expert and back, on one device, with and without capacity."""
