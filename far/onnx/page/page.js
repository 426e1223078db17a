// The page: reads the form, draws, and shows the tokens as they become known.

const element = (id) => document.getElementById(id);
const FIELDS = ["seed", "ar_steps", "head_steps", "guidance"];
const SHARE = 0.3; // of the drawing time, at most, is spent on previews

let config, run, sample;

function fillForm() {
  config.classes.forEach((name, number) => element("label").add(new Option(name, number)));
  const { defaults, model } = config, tokens = model.grid[0] * model.grid[1] / model.network.patch ** 2;
  element("ar_steps").max = tokens;
  element("ar_steps").value = defaults.ar_steps;
  element("ar_steps").disabled = model.network.backbone.kind === "causal";
  element("head_steps").value = [defaults.head_steps].flat()[0];
  element("guidance").value = defaults.guidance;
}

/** Return the values of the form, or null after showing which entry is invalid. */
function entries() {
  const values = { label: Number(element("label").value) };
  let wrong = null;
  for (const name of FIELDS) {
    const field = element(name), valid = field.value !== "" && field.checkValidity();
    field.setAttribute("aria-invalid", String(!valid));
    if (!valid) wrong ??= field;
    values[name] = Number(field.value);
  }
  const range = wrong && `from ${wrong.min} to ${wrong.max}`;
  const whole = wrong && wrong.step === "1" ? "a whole number" : "a number";
  error(wrong ? `${wrong.labels[0].textContent.trim()}: give ${whole} ${range}.` : "");
  wrong?.focus();
  return wrong ? null : values;
}

async function draw() {
  const options = entries();
  if (options === null) return;
  busy(true);
  status("Drawing …");
  const begin = performance.now(), name = config.classes[options.label];
  const subject = `of the class ${name}, seed ${options.seed}`;
  element("image").setAttribute("aria-label", `Unfinished drawing ${subject}`);
  let previews = 0;
  try {
    const latents = await sample(config, run, options, async (partial, known, step) => {
      progress(`Step ${step + 1} of ${options.ar_steps}`);
      const now = performance.now();
      if (step + 1 < options.ar_steps && previews <= SHARE * (now - begin)) {
        await show(partial, known);
        previews += performance.now() - now;
      }
      await new Promise((resolve) => setTimeout(resolve)); // lets the browser paint
    });
    await show(latents, null);
    element("image").setAttribute("aria-label", `Image ${subject}`);
    await offer(`${name.replaceAll(/[^\w-]+/g, "-")}-${options.seed}.png`);
    status(`Drawn in ${((performance.now() - begin) / 1000).toFixed(1)} seconds.`);
  } catch (problem) {
    status("");
    error(`The image could not be drawn: ${problem.message}`);
  } finally {
    busy(false);
  }
}

/** Decode latents onto the canvas, gray where tokens are not known. */
async function show(latents, known) {
  const { images } = await run("decoder.onnx", { latents });
  const [, , height, width] = images.dims, plane = height * width;
  const { grid, network: { patch } } = config.model;
  const [rows, columns] = grid.map((side) => side / patch);
  const picture = new ImageData(width, height); // its array clamps and rounds
  for (let i = 0; i < plane; i++) {
    const y = Math.floor(Math.floor(i / width) * rows / height), x = Math.floor((i % width) * columns / width);
    const drawn = known === null || known[y * columns + x];
    for (let c = 0; c < 3; c++) picture.data[4 * i + c] = drawn ? 255 * images.data[c * plane + i] : 128;
    picture.data[4 * i + 3] = 255;
  }
  const canvas = element("image");
  [canvas.width, canvas.height] = [width, height];
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

async function offer(name) {
  const blob = await new Promise((resolve) => element("image").toBlob(resolve, "image/png"));
  const link = element("save");
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.hidden = false;
}

/** Mark the buttons as disabled or not. A real `disabled` would take the focus from them. */
function busy(is) {
  for (const id of ["draw", "another"]) element(id).setAttribute("aria-disabled", String(is));
  if (is) element("save").hidden = true;
}

const isBusy = () => element("draw").getAttribute("aria-disabled") === "true";
// Screen readers announce the status, but not the progress.
const status = (text) => { element("status").textContent = text; progress(""); };
const progress = (text) => { element("progress").textContent = text; };
const error = (text) => { element("error").textContent = text; };

element("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!isBusy()) draw();
});
element("another").addEventListener("click", () => {
  if (isBusy()) return;
  const seed = element("seed");
  seed.value = seed.checkValidity() && seed.value !== "" ? (Number(seed.value) + 1) % 2 ** 32 : 0;
  draw();
});

async function load() {
  status("Loading the model …"); // replaces the text of index.html, which so sees that this script runs
  ({ sample } = await script("sampler.js"));
  const { loadModel } = await script("model.js");
  ({ config, run } = await loadModel((loaded, files) => progress(`File ${loaded + 1} of ${files}`)));
  fillForm();
  element("draw").disabled = element("another").disabled = false;
  status("Ready.");
}

/** Import a script here, not at the top, so that a failure shows on the page. */
async function script(file) {
  return import(`./${file}`).catch(() => {
    throw new Error(`The script ${file} or one that it imports cannot be loaded. Copy the whole folder again.`);
  });
}

load().catch((problem) => { status(""); error(problem.message); });
