"""Latency and memory of the UNet: stock beside accelerated beside the peers, interleaved in one process."""
