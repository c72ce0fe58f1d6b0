"""``seecal demo``: a real small vision-language model trained with CAL on real images, on the CPU."""
