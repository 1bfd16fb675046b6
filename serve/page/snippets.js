// The request of an image as programs that repeat it.

const shell = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

// JSON's texts and numbers are Python's too.
const python = (value) => (typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value));

const OPENAI = new Set(["model", "prompt", "size", "n"]);

/** Return the fields that make one image again, without the files. */
function fields(entry) {
  const { image, mask, previews, ...rest } = entry.request;
  return { ...rest, n: 1, seed: entry.seed };
}

/** Return a curl command that writes the image to image.png. */
export function curl(entry, base, needsKey) {
  const key = needsKey ? [`-H "Authorization: Bearer $LATENTFORGE_API_KEY"`] : [];
  const decode = `| python3 -c 'import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))' > image.png`;
  const edits = entry.request.image;
  const url = shell(new URL(edits ? "v1/images/edits" : "v1/images/generations", base).href);
  const values = { ...fields(entry), response_format: "b64_json" };
  const body = edits ? form(values, entry) : [`--json ${shell(JSON.stringify(values, null, 2))}`];
  return ["curl --fail-with-body " + url, ...key, ...body, decode].join(" \\\n  ");
}

function form(values, entry) {
  const texts = Object.entries(values).map(([name, value]) => `--form-string ${shell(`${name}=${value}`)}`);
  const files = ["image", "mask"].filter((name) => entry.request[name]);
  return [...files.map((name) => `-F ${name}=@${name}.png`), ...texts];
}

/** Return a Python program that writes the image to image.png by OpenAI's client. */
export function pythonProgram(entry, base, needsKey) {
  const values = Object.entries(fields(entry));
  const edits = entry.request.image;
  const known = values.filter(([name]) => OPENAI.has(name));
  const extra = values.filter(([name]) => !OPENAI.has(name));
  const files = edits ? ["image", "mask"].filter((name) => entry.request[name]) : [];
  const key = needsKey ? `os.environ["LATENTFORGE_API_KEY"]` : `"none"`;
  return [
    `import base64`, ...(needsKey ? [`import os`] : []), `from pathlib import Path`, ``,
    `from openai import OpenAI  # pip install openai`, ``,
    `client = OpenAI(base_url=${python(new URL("v1", base).href)}, api_key=${key})`,
    `answer = client.images.${edits ? "edit" : "generate"}(`,
    ...files.map((name) => `    ${name}=Path("${name}.png"),`),
    ...known.map(([name, value]) => `    ${name}=${python(value)},`),
    `    response_format="b64_json",`,
    `    extra_body={`,
    ...extra.map(([name, value]) => `        ${python(name)}: ${python(value)},`),
    `    },`,
    `)`,
    `Path("image.png").write_bytes(base64.b64decode(answer.data[0].b64_json))`,
  ].join("\n");
}
