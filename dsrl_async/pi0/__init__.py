"""The frozen flow-matching policy: Pi0 and Pi0.5 networks, sampler, checkpoints and processing."""
