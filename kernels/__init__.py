"""Operations on raw bytes: fast paths, device kernels, plain references. Import the modules."""
