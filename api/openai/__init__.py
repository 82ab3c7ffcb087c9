"""The routes under `/v1` that OpenAI's clients know: translation only, over the same calls as the native ones.

Ids are Tunery's own, so that a job or file has one id on every surface. The clients' types say what each field is
(`openai` 3.54); `docs/guide.md` says how hyperparameters are translated.
"""
