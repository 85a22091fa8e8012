"""Chatzuri's page: how to stream, by requests. Its host, key, chatbot and question are replaced."""

import json
import os

import requests

url = f"{os.environ['PARLEY_URL']}/api/v1/chat"
headers = {"Authorization": f"Bearer {os.environ['PARLEY_KEY']}", "Content-Type": "application/json"}
data = {
    "messages": [
        {"content": "How can I help you?", "role": "assistant"},
        {"content": os.environ["QUESTION"], "role": "user"},
    ],
    "chatbotId": os.environ["CHATBOT"],
    "stream": True,
    "temperature": 0,
}
response = requests.post(url, headers=headers, data=json.dumps(data), stream=True)  # noqa: S113 - as on the page
if response.status_code != 200:
    json_data = response.json()
    print("Error:" + json_data["message"])
else:
    decoder = response.iter_content(chunk_size=None)
    for chunk in decoder:
        chunk_value = chunk.decode("utf-8")
        print(chunk_value, end="", flush=True)
