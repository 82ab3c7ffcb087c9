"""Telling tenants of their jobs by HTTP, after the Standard Webhooks specification (standardwebhooks.com, v1.0).

signing.py   secrets and signatures
registry.py  where each tenant wants to be told
outbox.py    what is to be told: written in the transaction of the event, claimed and settled by the deliverer
history.py   deliveries as they are shown, and told once more
"""
