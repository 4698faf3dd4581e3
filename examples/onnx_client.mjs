// Runs a package's ONNX graph from JavaScript: greedy decoding, and no Python anywhere.
//
//   npm install onnxruntime-node @huggingface/tokenizers
//   node onnx_client.mjs PACKAGE "The quick brown fox" 32
//
// Prints one JSON document: the prompt's tokens, the answer's tokens and text, and the bytes of
// keys and values held. docs/ONNX.md describes every input used here.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { Tokenizer } from "@huggingface/tokenizers";
import * as ort from "onnxruntime-node";

const CHUNK = 256; // prompt tokens of one step

const readJson = (...path) => JSON.parse(readFileSync(join(...path), "utf8"));

// How many tokens a head holds, and how many of those are the pinned first ones.
function resolveSpan({ alpha, beta, window }, layout, capacity) {
  const wanted = Math.ceil((alpha + beta * capacity) / layout.block) * layout.block;
  const limit = Math.min(capacity, window ?? capacity);
  const size = Math.min(Math.max(wanted, layout.min_span), limit);
  return { size, sink: size === limit ? 0 : layout.sink };
}

// Frequencies of a rotary table; two kinds depend on the capacity. Fields that moac.json leaves out
// are neutral. Where only a part of a head rotates, zeros come last.
function frequencies(rope, headDim, capacity) {
  const { original_context: context = null, factor = 1, rotated = null } = rope;
  const turning = rotated ?? headDim;
  let found = rope.inv_freq;
  if (context !== null && capacity > context) {
    if (rope.kind === "longrope") found = rope.long_inv_freq;
    if (rope.kind === "dynamic") {
      const stretch = (factor * capacity) / context - (factor - 1);
      const theta = rope.theta * stretch ** (turning / (turning - 2));
      found = found.map((_, i) => theta ** ((-2 * i) / turning));
    }
  }
  return Float32Array.from({ length: headDim / 2 }, (_, i) => found[i] ?? 0);
}

// The graph's inputs for the frequencies of every rotary table.
const rotary = (ropes, headDim, capacity) =>
  Object.fromEntries(
    ropes.map((rope, table) => [
      table ? `inv_freq.${table}` : "inv_freq",
      new ort.Tensor("float32", frequencies(rope, headDim, capacity)),
    ]),
  );

const integers = (values, shape = [values.length]) =>
  new ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);

// One sequence of at most `capacity` tokens, prompt and answer together.
class Session {
  constructor(graph, layout, ropes, capacity) {
    const spans = layout.spans.map((span) => resolveSpan(span, layout, capacity));
    this.graph = graph;
    this.length = 0;
    this.fixed = {
      ...rotary(ropes, layout.head_dim, capacity),
      sinks: integers(spans.map((span) => span.sink)),
    };
    this.caches = {};
    for (const cache of layout.caches) {
      const shape = [1, cache.num_heads, spans[cache.span].size, layout.head_dim];
      const count = shape.reduce((a, b) => a * b);
      for (const part of ["key", "value"])
        this.caches[`${cache.name}.${part}`] = new ort.Tensor(
          layout.dtype, layout.dtype === "float16" ? new Uint16Array(count) : new Float32Array(count), shape);
    }
  }

  get bytes() {
    return Object.values(this.caches).reduce((sum, { data }) => sum + data.byteLength, 0);
  }

  // Feeds tokens, and returns the logits after the last of them.
  async feed(tokens) {
    let logits;
    for (let first = 0; first < tokens.length; first += CHUNK)
      logits = await this.step(tokens.slice(first, first + CHUNK));
    return logits;
  }

  async step(tokens) {
    const feeds = {
      ...this.fixed,
      tokens: integers(tokens, [1, tokens.length]),
      past_lengths: integers([this.length]),
      counts: integers([tokens.length]),
      wanted: integers([tokens.length - 1]),
    };
    // the same buffers come in and go out, so a step copies no cache
    const fetches = { logits: null };
    for (const [name, cache] of Object.entries(this.caches)) {
      feeds[`past.${name}`] = cache;
      fetches[`present.${name}`] = cache;
    }
    const results = await this.graph.run(feeds, fetches);
    for (const name of Object.keys(this.caches)) this.caches[name] = results[`present.${name}`];
    this.length += tokens.length;
    return results.logits.data;
  }
}

const argmax = (values) => values.reduce((best, value, i) => (value > values[best] ? i : best), 0);

const [folder, prompt, limit = "32"] = process.argv.slice(2);
if (prompt === undefined) {
  console.error("usage: node onnx_client.mjs PACKAGE PROMPT [MAX_TOKENS]");
  process.exit(2);
}
const layout = readJson(folder, "onnx.json");
const { ropes } = readJson(folder, "moac.json").model;
const eos = new Set(readJson(folder, "tokenizer", "generation.json").eos_token_ids);
const tokenizer = new Tokenizer(readJson(folder, "tokenizer", "tokenizer.json"), {});
const graph = await ort.InferenceSession.create(join(folder, layout.model), { logSeverityLevel: 3 });

const fed = tokenizer.encode(prompt).ids;
const capacity = Math.min(fed.length + Number(limit), layout.capacity);
const session = new Session(graph, layout, ropes, capacity);
const answer = [];
let next = argmax(await session.feed(fed));
while (answer.push(next) < capacity - fed.length && !eos.has(next))
  next = argmax(await session.feed([next]));
const text = tokenizer.decode(answer, { skip_special_tokens: true });
console.log(JSON.stringify({ prompt_ids: fed, token_ids: answer, text, kv_bytes: session.bytes }));
