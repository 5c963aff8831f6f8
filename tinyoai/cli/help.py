"""Help texts: descriptions and examples of the commands."""

ABOUT = """\
A small local LLM server that speaks OpenAI's HTTP API.

commands (each has --help):
  serve                    serve until Ctrl-C; the default command, which takes the options below
  status                   show the running servers: base URL, model, memory
  agent start|stop|restart|status|logs
                           run the server in the background
  cache [clear]            show and delete the conversations that are kept on disk
  get, set, unset          show and change the configuration file
"""

SERVE = """\
examples:
  tinyoai                                        the built-in model on http://127.0.0.1:8000/v1
  tinyoai --port 0                               a free port, which is printed
  tinyoai --model llama-2-7b-chat.Q4_K_M.gguf    a model file
  tinyoai --model m.gguf --ctx-size 2048 --parallel 2
  tinyoai --model ggml-gpt2.bin --model-type gpt2
  TINYOAI_API_KEY=secret tinyoai --host 0.0.0.0  open to other machines, with a key
  tinyoai --rate-limit 60,20000                  60 requests and 20,000 tokens per minute for each client
  tinyoai agent start --port 9000                in the background

Each option is also an environment variable (--ctx-size is TINYOAI_CTX_SIZE) and a key of the configuration file
(see tinyoai get --help). Flags override variables, variables override the file.
"""

STATUS = """\
examples:
  tinyoai status
  tinyoai status --json | jq -r '.[0].base_url'

The exit code is 0 if a server runs and 3 if none does. No API key is needed.
"""

CACHE = """\
examples:
  tinyoai cache                what is kept, by model
  tinyoai cache --json | jq .size
  tinyoai cache clear          delete all of it
  tinyoai cache clear m        delete what is kept of the model m

llamacpp models continue conversations from there after a restart. --cache-disk limits the size.
"""

GET = """\
examples:
  tinyoai get                  all values and their sources
  tinyoai get http             a group
  tinyoai get http.port        one value, without its name

The groups are http, model, models, access and log. Flags override variables (TINYOAI_PORT), variables override
the file, the file overrides the defaults. The file is config.json in the data directory. API keys are shown in
part.
"""

SET = """\
examples:
  tinyoai set http.port=9090
  tinyoai set http.host=0.0.0.0 access.api-key-file=keys
  tinyoai set model.file=~/models/llama-2-7b-chat.Q4_K_M.gguf
  tinyoai set http.cors-origin=https://a.example,https://b.example

Values are checked as flags are; if one is wrong, nothing is written. A running server keeps its values until it
is restarted, for example by tinyoai agent restart.
"""

UNSET = """\
examples:
  tinyoai unset http.port
  tinyoai unset model.file model.ctx-size
"""

AGENT = """\
usage: tinyoai agent start|stop|restart|status|logs [options]

Runs the server in the background. Each data directory has one agent. Servers started otherwise are not touched.

  start     start it with any flags of tinyoai serve, wait until it is ready and print its base URL
  stop      let running answers finish within the grace time, then end it
  restart   stop it if it runs, and start it again
  status    tinyoai status, for the agent only
  logs      show its output and log

Each has --help.
"""

AGENT_START = """\
examples:
  tinyoai agent start
  tinyoai agent start --port 9000 --model m.gguf
  TINYOAI_API_KEY=secret tinyoai agent start --host 0.0.0.0

Its log is agent.log in the data directory. It does not start again by itself after a reboot.
"""

AGENT_RESTART = """\
examples:
  tinyoai agent restart                 with the flags of the last start
  tinyoai agent restart --port 9001     with these flags only

Flags are stored, variables and API keys are not: an agent that had keys does not restart without keys.
"""

AGENT_STOP = """\
examples:
  tinyoai agent stop
"""

AGENT_LOGS = """\
examples:
  tinyoai agent logs
  tinyoai agent logs -n 200
  tinyoai agent logs --follow
"""
