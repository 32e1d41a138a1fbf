// Asks transformers.js about a folder that `convert --to transformers.js` wrote. Reads a JSON object from
// standard input and prints another one.
//
//     echo '{"model": "my_model", "texts": ["Once"], "prompts": ["Once"], "count": 40}' \
//         | node tools/transformers_js.mjs
//
// Needs `npm install @huggingface/transformers`, in the root of the repository or in a folder above the one
// that TRANSFORMERS_JS names. Prints the ids of the texts; for each prompt its ids and `count` greedy tokens;
// the texts that the prompts become in a batch; the logits at each token of the first prompt; and a chat.
import {readFileSync} from "node:fs";
import {basename, dirname, resolve} from "node:path";
import {pathToFileURL} from "node:url";

const folder = process.env.TRANSFORMERS_JS;
const {env, pipeline} = await import(
    folder ? pathToFileURL(`${folder}/dist/transformers.node.mjs`).href : "@huggingface/transformers"
);
const input = JSON.parse(readFileSync(0, "utf8"));
const path = resolve(input.model);
env.allowRemoteModels = false;
env.localModelPath = dirname(path);
const generate = await pipeline("text-generation", basename(path), {
    session_options: {intraOpNumThreads: 1, logSeverityLevel: 3},
});
const {tokenizer, model} = generate;

const list = (tensor) => Array.from(tensor.data, Number);
const options = {max_new_tokens: input.count, do_sample: false};
const prompts = input.prompts.map((prompt) => tokenizer(prompt));
const generated = [];
for (const ids of prompts) {
    const output = list(await model.generate({...ids, ...options}));
    generated.push(output.slice(ids.input_ids.size));
}
const batch = await generate(input.prompts, options);
console.log(JSON.stringify({
    texts: input.texts.map((text) => list(tokenizer(text, {add_special_tokens: false}).input_ids)),
    prompts: prompts.map((ids) => list(ids.input_ids)),
    generated,
    batch: batch.map(([answer]) => answer.generated_text),
    logits: list((await model(prompts[0])).logits),
    chat: tokenizer.apply_chat_template(
        [{role: "user", content: "Hello"}],
        {tokenize: false, add_generation_prompt: true},
    ),
    stops: model.generation_config.eos_token_id,
    dtype: model.config["transformers.js_config"].dtype,
}));
