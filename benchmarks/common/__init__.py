"""What the benchmarks share. Only pixels.py and mosaic_peer.py run in a peer's interpreter: they import no vitgraft."""
