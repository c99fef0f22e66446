"""From recordings to windows to batches: NumPy, SciPy, MNE, HDF5 and Grain; knows nothing of models or devices."""
