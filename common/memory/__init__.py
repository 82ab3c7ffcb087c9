"""How much memory a job will take, from its base's configuration and what was asked: plain numbers, no model, no torch.

`shape` reads a configuration, `setup` says what is trained and how the rest is held, `estimate` adds up the parts,
`fitting` chooses micro-batch and checkpointing for a card. API, preflight and trainer all ask here.
"""
