"""A hundred open-ended prompts: requests for a chat without a document, and beginnings of plain text."""

CHATS = """\
Hello! How are you today?
What can you do for me?
Tell me a story.
Tell me something about the sea.
Write a short poem about autumn.
Describe a busy market on a Saturday morning.
What should I cook tonight?
Give me some advice for my first day at work.
Why do people climb mountains?
How do I make a good cup of tea?
Explain what a train does.
Write a letter to an old friend.
What is the best time of the year?
Can you help me to plan a birthday party?
Describe your perfect day.
What makes a good teacher?
Tell me about dogs and cats.
How do bees make honey?
I am bored. What can I do?
Write a few lines about a lighthouse.
What would you take to a desert island?
Why is the sky blue?
Tell me about a famous inventor.
How can I sleep better?
Write the beginning of a detective story.
What is a good present for my sister?
Describe an old house at the end of a lane.
How do I learn to swim?
What do you think of the rain?
Tell me how a bicycle works.
What is friendship?
Write a speech for a wedding.
How can I save money?
Describe the taste of a lemon.
What happens in a library at night?
Give me three ideas for a walk.
Tell me about the moon.
Why do leaves fall?
How should I prepare for an exam?
Write a conversation between a king and a baker.
What is the use of history?
Describe a journey by boat.
How do I grow tomatoes?
Tell me what you know about Paris.
What would you ask a scientist?
Write a diary entry for a snowy day.
How do I say sorry to a neighbour?
What is a garden for?
Tell me a joke and explain it.
Thank you. What else is there to talk about?""".splitlines()

OPENINGS = """\
It was a cold morning, and the old man
The first thing to know about bread is
When the ship came into the harbour,
In the year 1850 the town
She opened the letter slowly and
The members of the committee met on
There was once a fisherman who
Most birds build their nests
My dear sister, I am writing
The road to the village runs
"Where have you been?" he asked.
After the war the family moved to
A good map shows
Nobody in the house had noticed that
The museum was founded by
The captain looked at the sky and
In order to repair the pump, first
We had been walking for three hours when
The president of the company said that
Every evening at six o'clock
The young doctor had never
Our experiment began with
The river is about
On the far side of the hill there
He was born in a small town and
The price of wheat rose
If you want to understand music,
The queen and her daughters were
All through the summer the children
The engine consists of
Dear customer, thank you for
At the end of the street stood
Scientists have long believed that
"I do not think so," said the girl,
The new law allows
Long before the railway was built,
The kitchen smelled of
They found the box under
The team won the match because
Winter in the north is
He put the key in his pocket and
Among the guests was a lady who
The whale rose to the surface and
To make the sauce, take
The school stands next to
It is a truth that
The film was directed by
Without a word she turned and
The committee agreed that the bridge should
And so, at last, they""".splitlines()
