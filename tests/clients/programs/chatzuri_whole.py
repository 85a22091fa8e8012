"""Chatzuri's page: how to chat, by requests. Its host, key, chatbot and question are replaced."""

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
    "stream": False,
    "temperature": 0,
}
response = requests.post(url, headers=headers, data=json.dumps(data))  # noqa: S113 - as on the page
json_data = response.json()
if response.status_code == 200:
    print("response:", json_data["text"])
else:
    print("Error:" + json_data["message"])
