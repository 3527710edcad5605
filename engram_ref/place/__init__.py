"""`engram-place`: where should a model's table live? Placements, their bytes, times, prices and energies."""
