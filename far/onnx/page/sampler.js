// The loop that draws one image: tokens in some order, several per AR step, each from noise by the head.
// It follows far/sampling.py. config.json describes the ONNX files that `run` calls.

import { Noise } from "./noise.js";

/**
 * Draw one image, and call `progress` after each AR step.
 *
 * @param {object} config content of config.json
 * @param {(file: string, inputs: object) => Promise<object>} run calls an ONNX file; tensors are {data, dims}
 * @param {object} options label, seed, ar_steps, head_steps, guidance
 * @param {(latents: object, known: boolean[], step: number) => Promise<void>} progress
 * @returns {Promise<object>} the latents
 */
export async function sample(config, run, options, progress = async () => {}) {
  const settings = { ...config.defaults, ...options };
  const shape = sizes(config);
  const noise = new Noise(settings.seed);
  const order = generationOrder(config, settings.order, noise, shape);
  const counts = tokenCounts(shape.tokens, settings.ar_steps);
  const drawn = normalsOf(noise, counts, shape.channels);
  const scales = guidanceScales(settings, counts, shape.tokens);
  const ask = config.model.network.backbone.kind === "masked" ? maskedBackbone : cachedBackbone;
  const guided = scales.some((scale) => scale !== 1) && !headGuides(config, settings.guidance);
  const labels = guided ? [settings.label, config.model.classes] : [settings.label];
  const backbone = ask(config, run, labels, shape);
  const draw = await head(config, run, settings);
  const sequence = new Float32Array(shape.tokens * shape.channels);
  const known = new Array(shape.tokens).fill(false);
  let start = 0;
  for (const [step, count] of counts.entries()) {
    const query = order.slice(start, start + count).sort((a, b) => a - b);
    const z = await backbone(sequence, order.slice(0, start), query);
    const tokens = await draw(z, drawn[step], scales[step], labels.length);
    query.forEach((position, index) => {
      const token = tokens.subarray(index * shape.channels, (index + 1) * shape.channels);
      if (config.model.network.spherical) onSphere(token, config.model.latent_channels);
      sequence.set(token, position * shape.channels);
      known[position] = true;
    });
    start += count;
    await progress(toLatents(sequence, config), known, step);
  }
  return toLatents(sequence, config);
}

function sizes(config) {
  const { grid, latent_channels, network } = config.model;
  const [rows, columns] = grid.map((side) => side / network.patch);
  return { rows, columns, tokens: rows * columns, channels: latent_channels * network.patch ** 2 };
}

function generationOrder(config, name, noise, { rows, columns, tokens }) {
  const raster = Array.from({ length: tokens }, (_, index) => index);
  if (name === "raster" || config.model.network.backbone.kind === "causal") return raster;
  const order = noise.permutation(tokens);
  return name === "halton" ? haltonOrder(rows, columns, order[0]) : order;
}

/** Return the order of the Halton sequence, shifted to begin at `first`. */
function haltonOrder(rows, columns, first) {
  const cells = new Map();
  for (let index = 0; cells.size < rows * columns; index++) {
    const y = scaledInverse(index, 2, rows), x = scaledInverse(index, 3, columns);
    if (!cells.has(y * columns + x)) cells.set(y * columns + x, [y, x]);
  }
  const top = Math.floor(first / columns), left = first % columns;
  return [...cells.values()].map(([y, x]) => (y + top) % rows * columns + (x + left) % columns);
}

/** Return floor(size · r), where r is `number` with its digits mirrored at the point. */
function scaledInverse(number, base, size) {
  let numerator = 0, denominator = 1; // whole numbers, because a rounded r can fall below a cell's edge
  for (; number; number = Math.floor(number / base)) {
    numerator = numerator * base + number % base;
    denominator *= base;
  }
  return Math.floor(numerator * size / denominator);
}

/** Return how many tokens each AR step draws (MAR's cosine schedule). */
export function tokenCounts(tokens, steps) {
  let masked = tokens;
  return Array.from({ length: steps }, (_, step) => {
    const left = Math.floor(tokens * Math.cos(Math.PI / 2 * (step + 1) / steps));
    const remaining = Math.max(0, Math.min(masked - 1, left));
    const count = masked - remaining;
    masked = remaining;
    return count;
  });
}

/** Return the noise of each AR step. Draws of whole blocks of 16 are one draw, as in Python. */
function normalsOf(noise, counts, channels) {
  if (!counts.every((count) => count * channels % 16 === 0)) {
    return counts.map((count) => noise.normals(count * channels));
  }
  const all = noise.normals(counts.reduce((sum, count) => sum + count) * channels);
  let start = 0;
  return counts.map((count) => all.subarray(start, start += count * channels));
}

/** Return the guidance scale of each AR step. */
function guidanceScales({ guidance, guidance_schedule, guidance_interval }, counts, tokens) {
  let before = 0;
  return counts.map((count) => {
    const after = before + count, at = before / tokens;
    before = after;
    if (at < guidance_interval[0] || at > guidance_interval[1]) return 1;
    if (guidance_schedule === "constant") return guidance;
    return 1 + (guidance - 1) * Math.min(after, tokens - 1) / tokens;
  });
}

function headGuides(config, guidance) {
  const most = config.model.network.head.max_guidance ?? 1;
  return config.defaults.guidance_passes !== 2 && guidance > 1 && guidance <= most;
}

// --- Backbones: functions of all tokens, known and query positions that return z, one row per label -----

function maskedBackbone(config, run, labels, { tokens, channels }) {
  const rows = labels.length;
  return async (sequence, known, query) => (await run("backbone.onnx", {
    tokens: floats(repeated(sequence, rows), [rows, tokens, channels]),
    known: integers(repeated(known, rows), [rows, known.length]),
    query: integers(repeated(query, rows), [rows, query.length]),
    labels: integers(labels, [rows]),
  })).z;
}

function cachedBackbone(config, run, labels, { channels }) {
  const { buffer, kind } = config.model.network.backbone;
  const [depth, , heads, , width] = config.onnx.files["backbone.onnx"].inputs.keys;
  const rows = labels.length;
  let keys = floats(new Float32Array(0), [depth, rows, heads, 0, width]), values = keys, held = 0;
  return async (sequence, known, query) => {
    // Copies of the class come first. Their tokens are not read.
    const copies = held ? [] : Array.from({ length: buffer }, (_, place) => place);
    const fresh = known.slice(Math.max(0, held - buffer));
    const places = [...copies, ...fresh.map((position) => position + buffer)];
    const fed = new Float32Array(places.length * channels);
    fresh.forEach((position, index) => {
      const token = sequence.subarray(position * channels, (position + 1) * channels);
      fed.set(token, (copies.length + index) * channels);
    });
    const inputs = {
      tokens: floats(repeated(fed, rows), [rows, places.length, channels]),
      places: integers(repeated(places, rows), [rows, places.length]),
      labels: integers(labels, [rows]),
      keys,
      values,
    };
    if (kind !== "causal") inputs.query = integers(repeated(query, rows), [rows, query.length]);
    const outputs = await run("backbone.onnx", inputs);
    keys = outputs.new_keys;
    values = outputs.new_values;
    held += places.length;
    return outputs.z;
  };
}

// --- Heads: functions of z, noise and guidance that return tokens ---------------------------------------

/** Return the function that draws tokens in steps [t, size], each with its embedded times. */
async function head(config, run, settings) {
  const { kind, max_guidance } = config.model.network.head;
  const steps = kind === "flow_map" ? flowMapSteps(settings.head_steps) : shortcutSteps(settings.head_steps);
  const times = steps.map((step) => step.times);
  const embedded = (await run("head_time.onnx", { times: floats(times.flat(), [steps.length, 2]) })).time;
  const width = embedded.dims[1];
  return async (z, noise, guidance, halves) => {
    const [rows, count] = z.dims;
    const flat = floats(z.data, [rows * count, z.dims[2]]);
    let condition = (await run("head_condition.onnx", { input: flat })).condition;
    if (kind === "flow_map" && max_guidance) {
      const learned = floats([10 * (halves === 1 ? guidance - 1 : 0)], [1]);
      const shift = (await run("head_guidance.onnx", { guidance: learned })).condition.data;
      condition = floats(condition.data.map((value, index) => value + shift[index % width]), condition.dims);
    }
    let x = noise.map((value) => value * settings.temperature);
    for (const [index, { size }] of steps.entries()) {
      const { output } = await run("head.onnx", {
        x: floats(repeated(x, rows), [rows * count, x.length / count]),
        condition,
        time: floats(embedded.data.slice(index * width, (index + 1) * width), [width]),
      });
      const uncond = output.data.subarray(rows === 2 ? x.length : 0);
      x = x.map((value, i) => {
        const velocity = rows === 2 ? uncond[i] + guidance * (output.data[i] - uncond[i]) : output.data[i];
        return value + size * velocity;
      });
    }
    return x;
  };
}

/** Return steps of sizes that are powers of two. The last ones are smaller if their number is none. */
function shortcutSteps(count) {
  const coarse = 2 ** Math.floor(Math.log2(count)), halved = count - coarse;
  const sizes = [...new Array(coarse - halved).fill(1 / coarse), ...new Array(2 * halved).fill(0.5 / coarse)];
  let t = 0;
  return sizes.map((size) => {
    const times = [1000 * t, size <= 1 / 128 ? 0 : 1000 * size];
    t += size;
    return { size, times };
  });
}

function flowMapSteps(count) {
  return Array.from({ length: count }, (_, index) => ({ size: 1 / count, times: [10 * index / count, 10 / count] }));
}

// --- Tensors ---------------------------------------------------------------------------------------------

const floats = (data, dims) => ({ type: "float32", data: Float32Array.from(data), dims });
const integers = (data, dims) => ({ type: "int64", data: BigInt64Array.from(data, BigInt), dims });

function repeated(values, times) {
  return Array.from({ length: times }, () => Array.from(values)).flat();
}

/** Scale each latent of a token, one value per channel, to the norm √channels, in place. */
function onSphere(token, channels) {
  const cells = token.length / channels;
  for (let cell = 0; cell < cells; cell++) {
    let sum = 0;
    for (let c = 0; c < channels; c++) sum += token[c * cells + cell] ** 2;
    const factor = Math.sqrt(channels) / Math.max(Math.sqrt(sum), 1e-6);
    for (let c = 0; c < channels; c++) token[c * cells + cell] *= factor;
  }
}

/** Return latents [1, channels, height, width] of a sequence of patches. */
function toLatents(sequence, config) {
  const { latent_channels: channels, grid: [height, width], network: { patch } } = config.model;
  const data = new Float32Array(channels * height * width);
  for (let c = 0; c < channels; c++) {
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const token = Math.floor(y / patch) * (width / patch) + Math.floor(x / patch);
        const within = (c * patch + y % patch) * patch + x % patch;
        data[(c * height + y) * width + x] = sequence[token * channels * patch ** 2 + within];
      }
    }
  }
  return floats(data, [1, channels, height, width]);
}
