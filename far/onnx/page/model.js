// Loads config.json and the ONNX files beside this script, and runs them with ONNX Runtime Web.

import * as ort from "./runtime/ort.wasm.min.js";

// Smallest module with an instruction of WebAssembly SIMD, which ONNX Runtime Web needs.
const SIMD = [
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11,
];
const MOST_THREADS = 4;
// ONNX Runtime's errors of an empty file (invalid argument) and of a broken one (invalid protobuf).
const DAMAGE = /ERROR_CODE: [27],/;
const NO_RUNTIME = /no available backend/; // its script or its WebAssembly cannot be loaded

/**
 * Load the model.
 *
 * @param {(loaded: number, files: number) => void} progress called before each file
 * @returns {Promise<{config: object, run: (file: string, inputs: object) => Promise<object>}>} `run` takes and
 *   returns tensors {type, data, dims} by name
 */
export async function loadModel(progress = () => {}) {
  if (!globalThis.WebAssembly || !WebAssembly.validate(new Uint8Array(SIMD))) {
    throw new Error("This browser has no WebAssembly SIMD. Use a current Firefox, Chrome, Edge or Safari.");
  }
  const runtime = (ending) => new URL(`runtime/ort-wasm-simd-threaded.${ending}`, import.meta.url);
  ort.env.wasm.wasmPaths = { mjs: runtime("js"), wasm: runtime("wasm") };
  // Threads need shared memory, which browsers allow to isolated pages only.
  const cores = navigator.hardwareConcurrency || 1;
  ort.env.wasm.numThreads = globalThis.crossOriginIsolated ? Math.min(MOST_THREADS, cores) : 1;
  const response = await fetched("config.json");
  const config = await response.json().catch(() => { throw damaged("config.json"); });
  const files = Object.keys(config.onnx.files), sessions = {};
  for (const [index, file] of files.entries()) {
    progress(index, files.length);
    const content = await (await fetched(file)).arrayBuffer();
    sessions[file] = await session(file, content);
  }
  const run = async (file, inputs) => {
    const tensors = mapped(inputs, ({ type, data, dims }) => new ort.Tensor(type, data, dims));
    const outputs = await sessions[file].run(tensors);
    return mapped(outputs, ({ type, data, dims }) => ({ type, data, dims }));
  };
  return { config, run };
}

async function session(file, content) {
  try {
    return await ort.InferenceSession.create(content, { executionProviders: ["wasm"] });
  } catch (problem) {
    if (DAMAGE.test(problem.message)) throw damaged(file);
    const what = NO_RUNTIME.test(problem.message) ? "ONNX Runtime in the folder runtime" : `The file ${file}`;
    throw new Error(`${what} cannot be loaded (${problem.message}). Copy the whole folder again.`);
  }
}

function damaged(file) {
  return new Error(`The file ${file} is damaged. Copy the whole folder again.`);
}

async function fetched(file) {
  const response = await fetch(new URL(file, import.meta.url));
  if (!response.ok) throw new Error(`The file ${file} is missing. Copy the whole folder to the server.`);
  return response;
}

function mapped(values, change) {
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, change(value)]));
}
