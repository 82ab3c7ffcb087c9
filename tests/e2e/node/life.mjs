// What `tests/e2e/test_openai.py` asks of the stock `openai` package for Node. Prints one JSON document of what it saw.
// Arguments: the folder of train.jsonl, valid.jsonl and broken.jsonl. OPENAI_BASE_URL and OPENAI_API_KEY are set.

import fs from "node:fs";
import path from "node:path";
import OpenAI from "openai";

const folder = process.argv[2];
const client = new OpenAI();
const jobs = client.fineTuning.jobs;
const quick = { max_length: 64, learning_rate: 1e-2, logging_steps: 1 };

async function upload(name) {
  return client.files.create({ file: fs.createReadStream(path.join(folder, name)), purpose: "fine-tune" });
}

async function until(id, wanted) {
  for (;;) {
    const job = await jobs.retrieve(id);
    if (wanted.includes(job.status)) return job;
    await new Promise((resolve) => setTimeout(resolve, 300));
  }
}

async function all(pages) {
  const found = [];
  for await (const item of pages) found.push(item);
  return found;
}

async function refusal(call) {
  try {
    await call();
    return null;
  } catch (error) {
    const kinds = ["BadRequestError", "NotFoundError", "AuthenticationError", "PermissionDeniedError"];
    const kind = kinds.find((name) => error instanceof OpenAI[name]) ?? String(error);
    return { kind, status: error.status, code: error.code, param: error.param, type: error.type, message: error.message };
  }
}

const ended = ["succeeded", "failed", "cancelled"];
const train = await upload("train.jsonl");
const valid = await upload("valid.jsonl");
const asked = {
  model: "tiny", training_file: train.id, validation_file: valid.id, suffix: "node-bot", seed: 11,
  metadata: { from: "node" },
  method: { type: "supervised", supervised: { hyperparameters: { n_epochs: 2, batch_size: 8 } } },
  hyperparameters: quick, lora: { r: 4 },
};
const created = await jobs.create(asked);
const repeated = await jobs.create(asked);
const succeeded = await until(created.id, ended);
const events = await all(jobs.listEvents(created.id, { limit: 3 }));
const checkpoints = await all(jobs.checkpoints.list(created.id, { limit: 1 }));
const result = await (await client.files.content(succeeded.result_files[0])).text();
const models = (await client.models.list()).data.map((model) => model.id);
const model = await client.models.retrieve(succeeded.fine_tuned_model);

const broken = await upload("broken.jsonl");
const failed = await until((await jobs.create({ model: "tiny", training_file: broken.id })).id, ended);

const long = await jobs.create({
  model: "tiny", training_file: train.id, hyperparameters: { ...quick, max_steps: 5000, per_device_train_batch_size: 2 },
});
await until(long.id, ["running"]);
await jobs.cancel(long.id);
const cancelled = await until(long.id, ended);

const mine = await all(jobs.list({ limit: 1, metadata: { from: "node" } }));
const refusals = {
  ended: await refusal(() => jobs.pause(long.id)),
  absent: await refusal(() => jobs.retrieve("ftjob-none")),
  dpo: await refusal(() => jobs.create({ model: "tiny", training_file: train.id, method: { type: "dpo" } })),
  stranger: await refusal(() => new OpenAI({ apiKey: "wrong" }).models.list()),
  base: await refusal(() => client.models.delete("tiny")),
};
const deleted = await client.models.delete(succeeded.fine_tuned_model);

console.log(JSON.stringify({
  created, repeated, succeeded, events, checkpoints, result, models, model, failed, cancelled, mine, refusals, deleted,
}));
